"""The first hour on a new card: everything tried in order of what it takes, in one folder to send back."""
