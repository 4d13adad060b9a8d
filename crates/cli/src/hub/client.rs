//! How clients follow redirects: with the token to nobody else.

use reqwest::redirect::Policy;
use reqwest::{Client, Url};

/// A client that stays on the host that it asks: it follows renames there, but not to the CDN or to anybody else.
pub(super) fn client(user_agent: &str) -> reqwest::Result<Client> {
    let policy = Policy::custom(|attempt| {
        let origin = attempt.previous().last().map(Url::origin);
        if origin == Some(attempt.url().origin()) && attempt.previous().len() < 10 {
            attempt.follow()
        } else {
            attempt.stop()
        }
    });
    Client::builder().user_agent(user_agent).redirect(policy).build()
}

/// A client for hf-hub, which follows redirects to the CDN. reqwest takes the token out on the way to another host; at a further redirect
/// within that host it would put it in again (0.13, which starts each time from the headers of the first request), so there it ends.
pub(super) fn following_client(user_agent: &str) -> reqwest::Result<Client> {
    let policy = Policy::custom(|attempt| {
        let (next, previous) = (attempt.url(), attempt.previous());
        let mut all = previous.iter().map(Url::origin).chain([next.origin()]);
        let first = all.next();
        let home = all.all(|origin| Some(origin) == first);
        let taken_out = previous.last().is_some_and(|last| {
            last.host_str() != next.host_str() || last.port_or_known_default() != next.port_or_known_default()
        });
        if previous.len() >= 10 {
            attempt.error("it redirects without end")
        } else if home || taken_out {
            attempt.follow()
        } else {
            let host = next.host_str().unwrap_or_default().to_owned();
            attempt.error(format!("{host} redirects further, where the token would go along"))
        }
    });
    Client::builder().user_agent(user_agent).redirect(policy).build()
}
