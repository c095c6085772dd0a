"""What all kinds of artifact share: the exporter's contract, files and their hashes, views, engines, the proof."""
