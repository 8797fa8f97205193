"""Data: records, their order, images, text, and global batches."""
