"""Many runs: their plan, their manifest, what the terminal shows of them, and the fair protocol."""
