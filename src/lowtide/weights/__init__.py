"""Where weights live: homes that bring a block's weights to the device and take them back."""

from .home import DeviceHome

__all__ = ["DeviceHome"]
