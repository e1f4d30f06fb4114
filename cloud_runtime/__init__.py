"""Serve bundles to nearfar clients over an end-to-end encrypted websocket."""
