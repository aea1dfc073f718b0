"""The agent behind HTTP, without Ray: documents being made, the API, its keys and limits, and the page."""
