"""The same under the name of the library that builds without a GPU."""

from tensorrt import *  # noqa: F403
from tensorrt import __version__ as __version__
