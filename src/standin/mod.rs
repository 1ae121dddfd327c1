//! How does GitLab answer? A strict stand-in for GitLab's runner API.
//!
//! A function from request to response ([`Standin::call`]), called directly with the clock paused
//! or served on a socket ([`serve`]). It refuses what GitLab refuses. `exec` uses it as its
//! GitLab; tests hold dayfly against it. Nothing on the daemon's path names it.
