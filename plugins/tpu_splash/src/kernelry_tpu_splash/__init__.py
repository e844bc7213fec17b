"""Attention kernels for TPUs: splash attention, ragged decode and paged attention."""
