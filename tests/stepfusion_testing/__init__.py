"""What several test files share. The name collides with no package."""
