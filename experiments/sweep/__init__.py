"""Many runs: their plan, their manifest, the terminal's view of them and the fair protocol."""
