"""What kitrocket knows about DodoPayments, without a database: signatures, events, and what they mean."""
