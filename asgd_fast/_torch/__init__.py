"""What only the torch optimizer needs: its state, its averages, and its tensors as rows."""
