"""What the agent can call. One small interface (`tools.base`); each tool is one file."""
