"""The networks of the method: teacher, Local-Net, Global-Net, heads, and the whole model."""
