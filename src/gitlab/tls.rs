//! What rustls is told: roots, CA file, client certificate, and messages that name what to fix.
