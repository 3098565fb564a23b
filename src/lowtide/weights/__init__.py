"""Where weights live: homes that bring a block's weights to the device and take them back."""

from .disk import DiskStore
from .home import DeviceHome
from .host import HostStore
from .inputs import HostInputs
from .placing import LazyWeights, MixedHome, by_name, place
from .streamed import StreamedHome
from .working_copy import TornWorkingCopyError

__all__ = [
    "DeviceHome",
    "DiskStore",
    "HostInputs",
    "HostStore",
    "LazyWeights",
    "MixedHome",
    "StreamedHome",
    "TornWorkingCopyError",
    "by_name",
    "place",
]
