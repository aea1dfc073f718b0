"""What the agent is: its system prompt, the tag protocol, the document."""
