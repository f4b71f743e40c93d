"""What continues token ids: so far the executor, in one process or in one for each rank."""
