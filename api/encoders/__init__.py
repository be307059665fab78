"""How an answer leaves: as server-sent events, or as frames of a WebSocket."""
