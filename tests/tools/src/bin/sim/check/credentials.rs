//! 9: each request to GitLab carries one credential, the right one, and the job of its path is its token's.

use super::{Checker, Findings};
use crate::event::Event;
use crate::ledger::Ledger;
use crate::seams::gitlab::token_in;
use dayfly_exec::standin::Route;

pub(crate) struct Credentials;

/// Headers that GitLab would take for a credential, or a proxy on the way.
const OTHERS: [&str; 5] = ["private-token", "authorization", "cookie", "deploy-token", "job_token"];

impl Checker for Credentials {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        let Event::Request(request) = event else { return };
        let route = request.route;
        if request.headers.keys().any(|name| OTHERS.contains(&name.as_str())) {
            findings.add(9, format!("a request of {route:?} carries a credential of another kind"));
        }
        let query = request.uri.query().unwrap_or_default();
        if query.contains("token") {
            findings.add(9, format!("a request of {route:?} carries a token in its query"));
        }
        let of_header = |name: &str| -> Vec<&str> {
            request.headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect()
        };
        let (job_tokens, runner_tokens) = (of_header("job-token"), of_header("runner-token"));
        match (route, request.job) {
            (Route::RequestJob | Route::VerifyRunner, None) => {
                let known = runner_tokens.first().is_some_and(|token| ledger.runner_tokens.iter().any(|t| t == token));
                if !job_tokens.is_empty() || runner_tokens.len() != 1 || !known {
                    findings.add(9, format!("a request of {route:?} without exactly its runner's token"));
                }
            }
            (Route::Unknown, _) | (_, None) => {
                findings.add(9, format!("a request that nobody should send: {}", request.uri))
            }
            (_, Some(job)) => {
                let own = ledger.jobs.get(&job).is_some_and(|note| job_tokens == [note.token.as_str()]);
                if !own || !runner_tokens.is_empty() {
                    findings.add(9, format!("a request of {route:?} for job {job} without exactly that job's token"));
                }
                let body = (route == Route::UpdateJob).then(|| token_in(request.body)).flatten();
                if let (Some(shown), Some(note)) = (body, ledger.jobs.get(&job))
                    && shown != note.token
                {
                    findings.add(9, format!("a PUT for job {job} with another token in its body"));
                }
            }
        }
    }
}
