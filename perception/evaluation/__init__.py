"""Scores of decoded scenes: boxes by the official nuScenes devkit, lanes by the published protocols."""
