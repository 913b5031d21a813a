"""What all HTTP servers of the platform share: errors, request ids, access logs, offline documentation, serving."""
