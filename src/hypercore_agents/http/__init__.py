"""What every HTTP server of ours shares: errors at the edge, request ids and access logs, offline docs, serving."""
