"""One model on many processes: FSDP2, tensor, sequence and context parallelism."""
