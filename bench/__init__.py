"""Measurements of the kernels: what they need (`kernel_resources`) and how fast they are (`kernels`)."""
