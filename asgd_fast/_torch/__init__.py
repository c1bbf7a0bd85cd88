"""What only the torch optimizer needs: its state, its averages, and the way of its tensors to rows."""
