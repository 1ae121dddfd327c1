//! Which request is which: method and raw path, matched without decoding.

use dayfly::gitlab::JobId;
use http::Method;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Route {
    /// `POST /jobs/request`
    RequestJob,
    /// `PUT /jobs/:id`
    UpdateJob,
    /// `PATCH /jobs/:id/trace`
    AppendTrace,
    /// `POST /jobs/:id/artifacts`
    UploadArtifacts,
    /// `POST /jobs/:id/artifacts/authorize`, the front proxy's own call
    AuthorizeArtifacts,
    /// `GET /jobs/:id/artifacts`
    DownloadArtifacts,
    /// `GET /jobs/:id/runtime_environment_key`
    RuntimeEnvironmentKey,
    /// `POST /runners`
    RegisterRunner,
    /// `DELETE /runners`
    DeleteRunner,
    /// `POST /runners/verify`
    VerifyRunner,
    /// `DELETE /runners/managers`
    DeleteManager,
    /// `POST /runners/reset_authentication_token`
    ResetToken,
    /// `GET /runners/router/discovery`
    Discovery,
    /// `GET /<project>.git/…`
    Git,
    /// `GET /-/object-storage/…`: where a direct download is redirected to
    ObjectStorage,
    /// Anything else.
    Unknown,
}

/// Route and job id of a request.
pub(super) fn find(method: &Method, path: &str) -> (Route, Option<JobId>) {
    let Some(api) = path.strip_prefix("/api/v4/") else {
        return match (method.as_str(), path) {
            ("GET" | "HEAD", path) if path.starts_with("/-/object-storage/") => (Route::ObjectStorage, None),
            (_, path) if path.contains(".git/") => (Route::Git, None),
            _ => (Route::Unknown, None),
        };
    };
    let parts: Vec<&str> = api.split('/').collect();
    let route = match (method.as_str(), parts.as_slice()) {
        ("POST", ["jobs", "request"]) => Route::RequestJob,
        ("POST", ["runners"]) => Route::RegisterRunner,
        ("DELETE", ["runners"]) => Route::DeleteRunner,
        ("POST", ["runners", "verify"]) => Route::VerifyRunner,
        ("DELETE", ["runners", "managers"]) => Route::DeleteManager,
        ("POST", ["runners", "reset_authentication_token"]) => Route::ResetToken,
        ("GET", ["runners", "router", "discovery"]) => Route::Discovery,
        (method, ["jobs", id, rest @ ..]) => {
            let route = match (method, rest) {
                ("PUT", []) => Route::UpdateJob,
                ("PATCH", ["trace"]) => Route::AppendTrace,
                ("POST", ["artifacts"]) => Route::UploadArtifacts,
                ("POST", ["artifacts", "authorize"]) => Route::AuthorizeArtifacts,
                ("GET", ["artifacts"]) => Route::DownloadArtifacts,
                ("GET", ["runtime_environment_key"]) => Route::RuntimeEnvironmentKey,
                _ => Route::Unknown,
            };
            return match id.parse() {
                Ok(id) => (route, Some(JobId(id))),
                Err(_) => (Route::Unknown, None),
            };
        }
        _ => Route::Unknown,
    };
    (route, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_paths_are_known() {
        assert_eq!(find(&Method::PUT, "/api/v4/jobs/7"), (Route::UpdateJob, Some(JobId(7))));
        assert_eq!(find(&Method::PATCH, "/api/v4/jobs/7/trace"), (Route::AppendTrace, Some(JobId(7))));
        for path in ["/api/v4/jobs/7/", "/api/v4/jobs/x", "/api/v4//jobs/7", "/api/v4/jobs/%37", "/jobs/7", "/"] {
            assert_eq!(find(&Method::PUT, path).0, Route::Unknown, "{path}");
        }
        assert_eq!(find(&Method::GET, "/a/b.git/info/refs").0, Route::Git);
    }
}
