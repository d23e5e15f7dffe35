# bench: `make bench`.
