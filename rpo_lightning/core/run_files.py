"""The names of the files that a run leaves in its folder."""

CACHE_FILE = "cache.parquet"
COMPLETIONS_FILE = "completions.jsonl"
EARLIER_COMPLETIONS_FILE = "completions-earlier.jsonl"
METRICS_FILE = "metrics.csv"
POLICY_FOLDER = "policy"  # a folder
PREDICTIONS_FILE = "predictions.jsonl"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
# Of `validate` and `test`: every answer, and the table of the metrics.
EVALUATION_FILE = "evaluation.parquet"
EVALUATION_TABLE = "evaluation.md"
