"""Stand-ins and studies that run on a laptop."""
