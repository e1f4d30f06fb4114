"""The far route: one encrypted websocket to a cloud runtime."""
