//! The ways in which the hub can misbehave, and which request each is for.
//!
//! A fault is planned for the next few requests to a path instead of for a moment, so that a test does not
//! depend on timing: whichever connection asks first gets it.

use std::sync::{Mutex, PoisonError};

/// What goes wrong with an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Another status, and nothing is done.
    Status {
        /// The status code.
        code: u16,
        /// The seconds of a `Retry-After` header.
        retry_after: Option<u64>,
        /// The answer's body.
        body: String,
    },
    /// A page of HTML with status 200, as a proxy that wants a login gives, and nothing is done.
    Html,
    /// The whole length is announced, `after` bytes are sent, then the connection is closed.
    Drop {
        /// The bytes that are sent.
        after: u64,
    },
    /// The same, but the connection stays open and silent for two minutes.
    Stall {
        /// The bytes that are sent.
        after: u64,
    },
    /// A well-formed answer whose body, and `Content-Length`, ends early.
    Short {
        /// The bytes that are missing at the end.
        by: u64,
    },
    /// One byte of the body is wrong: this one, or the last if the body is shorter.
    Flip {
        /// Its position.
        at: u64,
    },
    /// Status 200 with everything, though a range was asked for.
    IgnoreRange,
    /// Status 416, and nothing is done.
    NotSatisfiable,
    /// A redirect, and nothing is done.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        code: u16,
        /// Where to.
        location: String,
    },
    /// The body comes slowly.
    Slow {
        /// Its speed.
        bytes_per_second: u64,
    },
}

struct Plan {
    part: String,
    times: usize,
    fault: Fault,
}

/// The faults to come.
#[derive(Default)]
pub(crate) struct Faults(Mutex<Vec<Plan>>);

impl Faults {
    pub(crate) fn plan(&self, part: &str, times: usize, fault: Fault) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Plan {
            part: part.to_owned(),
            times,
            fault,
        });
    }

    pub(crate) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The fault for a request, which is used up by it.
    ///
    /// Requests other than GET and POST get one only where the plan names the method: a client asks with HEAD
    /// first, and the fault would never reach the download that the test is about.
    pub(crate) fn take(&self, method: &str, line: &str) -> Option<Fault> {
        let mut plans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = matches!(method, "GET" | "POST");
        let named = format!("{method} ");
        let plan = plans.iter_mut().find(|plan| {
            plan.times > 0 && line.contains(&plan.part) && (open || plan.part.contains(&named))
        })?;
        plan.times -= 1;
        Some(plan.fault.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_used_up() {
        let faults = Faults::default();
        faults.plan("/resolve/", 1, Fault::Html);
        faults.plan("HEAD /a", 1, Fault::NotSatisfiable);
        assert_eq!(faults.take("HEAD", "hub HEAD /x/resolve/main/y"), None);
        assert_eq!(faults.take("HEAD", "hub HEAD /a/resolve/main/y"), Some(Fault::NotSatisfiable));
        assert_eq!(faults.take("GET", "hub GET /x/resolve/main/y"), Some(Fault::Html));
        assert_eq!(faults.take("GET", "hub GET /x/resolve/main/y"), None);
    }
}
