"""The Autobahn test cases against the cloud runtime's websocket; see README.md."""
