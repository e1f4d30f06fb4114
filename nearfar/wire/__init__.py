"""The wire protocol: messages, their encoding, and who may say what when; no sockets.

Specification: docs/reference/wire.md.
"""
