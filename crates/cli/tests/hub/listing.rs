//! Listings of many pages, and where the token may go.

use mlx_quant_hub_fixture::{Fault, Kind, Server};

use crate::place::{ID, Place, assert_same, failed, files, finish, fixture};

/// Converts the model at [`ID`] from pages with such links, and looks that everything came from the endpoint.
fn whole(link: &str) -> Place {
    let place = Place::with_model();
    place.hub.pages(2, link);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    place.succeed(&format!("convert -q --model {} --mlx-path local", fixture("llama_tied").display()));
    assert_same(&place.at("out"), &place.at("local"));
    let requests = place.hub.requests();
    let asked = |server: Server| requests.iter().filter(|request| request.server == server).count();
    assert_eq!(asked(Server::Elsewhere), 0, "{link}: somebody else was asked");
    let pages = requests.iter().filter(|request| request.path.contains("/tree/"));
    let pages: Vec<_> = pages.collect();
    assert!(pages.len() >= 3, "{link}: {} pages", pages.len());
    assert!(pages.iter().all(|page| page.token && page.status == 200), "{link}: {pages:?}");
    place
}

/// Whatever form a link has, no page is left out.
#[test]
fn links_of_any_form_lead_to_the_next_page() {
    for link in [
        r#"<{hub}{path}?{query}>; rel="next""#,
        r#"<{path}?{query}>; rel="next""#,
        r"<?{query}>; rel=next",
        r#"<../tree/main?{query}>; title="a, b"; REL="NEXT""#,
        r#"<{hub}{path}?cursor=0>; rel="first", <{hub}{path}?{query}>; rel="next""#,
    ] {
        whole(link);
    }
}

/// Wherever a link leads, only the endpoint is asked.
#[test]
fn links_to_other_hosts_lead_to_the_endpoint() {
    for link in [
        r#"<{elsewhere}{path}?{query}>; rel="next""#,
        r#"<{elsewhere}/evil?{query}>; rel="next""#,
        r#"<http://user:password@evil.example{path}?{query}>; rel="next""#,
        r#"<//evil.example{path}?{query}>; rel="next""#,
        r#"<file:///etc/passwd?{query}>; rel="next""#,
        r#"<{hub}@evil.example/?{query}>; rel="next""#,
    ] {
        whole(link);
    }
}

/// As for models.
#[test]
fn pages_of_a_dataset() {
    let place = Place::with_model();
    let line = |at: usize| {
        (format!("data/train-{at}.jsonl"), format!("{{\"text\": \"{}\"}}\n", "a b ".repeat(400)).into_bytes())
    };
    place.hub.add(Kind::Dataset, "some-org/texts", (0..9).map(line).collect());
    place.hub.pages(2, r#"<{elsewhere}{path}?{query}>; rel="next""#);
    let said =
        place.succeed(&format!("eval --model {ID} --data some-org/texts --windows 2 --sequence-length 32"));
    assert!(said.contains("train-8.jsonl"), "{said}");
    assert!(place.hub.requests().iter().all(|request| request.server != Server::Elsewhere));
}

/// A listing that goes round in circles ends.
#[test]
fn listings_without_end() {
    for (link, words) in [
        (r#"<{path}?cursor=1>; rel="next""#, "comes round again"),
        (r#"<{path}?recursive=true>; rel="next""#, "the first one"),
        (r#"<{elsewhere}>; rel="next""#, "the first one"),
    ] {
        let place = Place::with_model();
        place.hub.pages(2, link);
        place.fail(&format!("convert -q --model {ID} --mlx-path out"), 1, &[words, "HF_ENDPOINT"]);
        assert!(place.downloads().is_empty() && !place.at("out").exists());
    }
}

/// What breaks in the middle goes on at that page.
#[test]
fn a_page_that_breaks_is_asked_for_again() {
    let status =
        |code: u16, retry_after: Option<u64>| Fault::Status { code, retry_after, body: String::new() };
    for fault in
        [Fault::Drop { after: 20 }, status(503, None), status(429, Some(1)), Fault::Stall { after: 10 }]
    {
        let place = Place::with_model();
        place.hub.pages(2, r#"<{hub}{path}?{query}>; rel="next""#);
        place.hub.fault("cursor=4", 1, fault.clone());
        place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
        let requests = place.hub.requests();
        let asked = |part: &str| requests.iter().filter(|request| request.path.contains(part)).count();
        assert_eq!((asked("cursor=2"), asked("cursor=4")), (1, 2), "{fault:?}");
    }
    let place = Place::with_model();
    place.hub.fault("/tree/", 100, status(429, Some(3600)));
    place.fail(&format!("convert -q --model {ID} --mlx-path out"), 1, &["takes no more requests", "3600 s"]);
}

#[test]
fn a_renamed_repository_has_pages_too() {
    let place = Place::with_model();
    place.hub.pages(2, r#"<{hub}{path}?{query}>; rel="next""#);
    place.hub.rename(ID, "new-org/New-Name");
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    place.succeed(&format!("convert -q --model {} --mlx-path local", fixture("llama_tied").display()));
    assert_same(&place.at("out"), &place.at("local"));
}

/// The same file twice is one, two files of one name are none.
#[test]
fn names_that_come_twice() {
    let entry =
        |size: u64| format!(r#"{{"type":"file","oid":"{}","size":{size},"path":"x.bin"}}"#, "a".repeat(40));
    let body = |second: u64| format!("[{},{}]", entry(3), entry(second));
    for (second, words) in [(3, "no config.json"), (4, "lists two files")] {
        let place = Place::with_model();
        let fault = Fault::Status { code: 200, retry_after: None, body: body(second) };
        place.hub.fault("/tree/", 1, fault);
        place.fail(&format!("convert -q --model {ID} --mlx-path out"), 2, &[words]);
    }
}

/// Redirects to another host, which redirects further, at every kind of request: the token goes along to none of them.
#[test]
fn redirects_to_other_hosts_bring_no_token() {
    for path in ["GET /api/models/", "/tree/", "HEAD /", "/resolve/", "/config.json", "cdn GET"] {
        for (code, times) in [(302, 100), (307, 1), (308, 2)] {
            let place = Place::with_model();
            let location = format!("{}/config.json?next=/resolve/HEAD%20/tree/", place.hub.elsewhere());
            place.hub.fault(path, times, Fault::Redirect { code, location: location.clone() });
            place.hub.fault("elsewhere", times, Fault::Redirect { code, location });
            let line = format!("convert -q --model {ID} --mlx-path out");
            let output = finish(&mut place.command(&line));
            // That nobody else saw the token is looked at after every test.
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() || said.contains("hint:"), "{path}: {said}");
            let asked = place.hub.requests().iter().any(|request| request.server == Server::Elsewhere);
            assert!(asked || path == "/tree/", "{path}: nobody else was asked");
        }
    }
}

/// Beyond the first step reqwest itself would send it along.
#[test]
fn redirects_within_another_host_are_not_followed() {
    for path in ["HEAD /some-org", "/config.json", "/api/models/"] {
        let place = Place::with_model();
        let location = format!("{}/further", place.hub.elsewhere());
        place.hub.fault(path, 100, Fault::Redirect { code: 302, location: location.clone() });
        place.hub.fault("elsewhere GET /", 100, Fault::Redirect { code: 302, location: location.clone() });
        place.hub.fault("elsewhere HEAD /", 100, Fault::Redirect { code: 302, location });
        let line = format!("convert -q --model {ID} --mlx-path out");
        place.fail(&line, 1, &["redirects", "HF_ENDPOINT"]);
    }
}

/// The requests of an upload, too.
#[test]
fn redirected_uploads_bring_no_token() {
    let place = Place::with_model();
    place.hub.offer_xet(true);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    for path in
        ["/whoami-v2", "/validate-yaml", "/xet-write-token/", "/repos/create", "/preupload/", "/commit/"]
    {
        for code in [302, 307] {
            place.hub.calm();
            let location = format!("{}/elsewhere", place.hub.elsewhere());
            place.hub.fault(path, 100, Fault::Redirect { code, location });
            let line = format!("upload out --upload-repo my-org/{}-{code}", &path[1..4]);
            assert!(!finish(&mut place.command(&line)).status.success(), "{path}");
        }
    }
}

/// A listing is only read where HF_ENDPOINT says.
#[test]
fn a_listing_that_is_elsewhere_is_refused() {
    for code in [301, 302, 307] {
        let place = Place::with_model();
        let location = format!("{}/api/models/a/b/tree/c", place.hub.elsewhere());
        place.hub.fault("/tree/", 1, Fault::Redirect { code, location });
        let line = format!("convert -q --model {ID} --mlx-path out");
        let other = format!("sends to {}", place.hub.elsewhere());
        failed(&line, &finish(&mut place.command(&line)), 2, &[&other, "HF_ENDPOINT"]);
        assert!(place.hub.requests().iter().all(|request| request.server != Server::Elsewhere));
    }
}

/// What a listing's errors mean is said as before.
#[test]
fn errors_of_listings_are_explained() {
    let answer =
        |code: u16| Fault::Status { code, retry_after: None, body: r#"{"error": "so it is"}"#.to_owned() };
    for (code, exit, words) in [
        (401, 2, "does not accept the token"),
        (403, 2, "forbids that with this token (so it is)"),
        (404, 2, "no repository"),
        (418, 1, "answered 418"),
        (500, 1, "answered 500"),
    ] {
        let place = Place::with_model();
        place.hub.fault("/tree/", 100, answer(code));
        place.fail(&format!("convert -q --model {ID} --mlx-path out"), exit, &[words]);
    }
    let place = Place::new();
    let mut all = files(&fixture("llama_tied"));
    all.extend((0..120).map(|at| (format!("extra/{at:03}.md"), vec![1])));
    place.hub.add(Kind::Model, ID, all);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
}
