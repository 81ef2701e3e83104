"""`canter demo`: synthesise a corpus, train on it, and report."""
