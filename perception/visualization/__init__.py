"""Pictures of frames with boxes and lines."""
