"""What lasts: the trajectory record, its status table, and the store that stands between all stages."""
