"""What evaluation computes, over well-known libraries."""
