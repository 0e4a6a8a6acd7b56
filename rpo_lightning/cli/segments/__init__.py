"""What each part of a reasoning path does, and what a run did: segment analysis and reports."""
