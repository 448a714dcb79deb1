"""The pages and pictures that looks leave: one frame, one style sheet, one script."""
