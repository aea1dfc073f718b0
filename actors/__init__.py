"""What runs: the Ray actors of every stage, and the tool and judge deployments."""
