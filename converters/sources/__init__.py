"""What can be converted: recognised, checked and described before anything is loaded."""
