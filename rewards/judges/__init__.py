"""Judges. One file each; all follow `rewards.base.Judge`."""
