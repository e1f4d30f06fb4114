"""What the nearfar packages share: bundles, the wire, the secure channel, engines, errors.

Importing this package imports nothing else; each module is imported where it is used.
"""

__version__ = "0.1.0"
