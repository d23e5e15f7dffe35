# tests/guests: real guests and hand-written ones, by vmrun; fetch gets the real ones from Debian.
EXTRA_DIST += tests/guests/fetch tests/guests/init tests/guests/cli
script_tests += tests/guests/cli
