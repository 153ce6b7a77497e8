"""A test double of the vendor's plugin: `import torch_gcu` makes a device `gcu` and `eccl`."""

from device_doubles import double

double.install("gcu", double.as_plugin)
