"""Memory borrowed by DLPack, checked, and listed as the rows of a step."""
