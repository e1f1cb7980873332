"""Every setting, changed, changes something that a user can see; a new one without a case fails."""
