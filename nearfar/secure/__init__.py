"""Server identity, signed key configurations, handshake and record layer; no sockets, no clock.

Specification: docs/reference/secure-channel.md. Unaudited.
"""
