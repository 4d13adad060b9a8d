//! Model cards, which the hub judges before anything is sent.

use std::sync::{Arc, Mutex};

use mlx_quant_hub_fixture::{Fault, Kind, Verdict};

use crate::place::{ID, Place, failed, files, finish, fixture};

const TO: &str = "my-org/Tiny-4bit";

/// A model with this front matter at [`ID`], converted to `out`.
fn converted(front: &str) -> Place {
    let place = Place::new();
    place.hub.offer_xet(true);
    let mut all = files(&fixture("llama_tied"));
    all.retain(|(name, _)| name != "README.md");
    all.push(("README.md".to_owned(), front.as_bytes().to_vec()));
    place.hub.add(Kind::Model, ID, all);
    place.succeed(&format!("convert -q --model {ID} --mlx-path out"));
    place
}

fn card(place: &Place) -> String {
    std::fs::read_to_string(place.at("out/README.md")).unwrap()
}

fn uploaded(place: &Place) -> String {
    String::from_utf8(place.hub.files(TO, "main")["README.md"].clone()).unwrap()
}

/// Refuses cards in which such lines stand, with those words.
fn refuse(place: &Place, rules: &[(&str, &str)]) -> Arc<Mutex<Vec<String>>> {
    let rules: Vec<(String, String)> =
        rules.iter().map(|(line, words)| ((*line).to_owned(), (*words).to_owned())).collect();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&asked);
    place.hub.judge_cards(move |card| {
        record.lock().unwrap().push(card.to_owned());
        let broken = rules.iter().filter(|(line, _)| card.lines().any(|own| own.starts_with(line.as_str())));
        Verdict { errors: broken.map(|(_, words)| words.clone()).collect(), warnings: Vec::new() }
    });
    asked
}

const FRONT: &str = "---\nlicense: other\nlicense_name: my-own\nlicense_link: LICENSE\nlanguage:\n- English\n- de\n---\nText\n";

/// What the hub refuses of what came from the source is left out, one after the other.
#[test]
fn refused_inherited_keys_are_left_out_with_a_note() {
    let place = converted(FRONT);
    let before = card(&place);
    let asked = refuse(
        &place,
        &[
            ("- English", r#""language[0]" must only contain lowercase characters"#),
            ("license_link: LICENSE", r#""license_link" is no link"#),
        ],
    );
    let said = place.succeed(&format!("upload out --upload-repo {TO}"));
    for words in ["left out language", "left out license_link", "lowercase characters", "is no link"] {
        assert!(said.contains(words), "{words}\n{said}");
    }
    assert_eq!(asked.lock().unwrap()[0], before);
    let after = card(&place);
    assert_eq!(
        after,
        before.replace("language:\n- English\n- de\n", "").replace("license_link: LICENSE\n", "")
    );
    assert!(
        after.contains("license: other\nlicense_name: my-own\n") && after.contains("base_model: "),
        "{after}"
    );
    assert_eq!(uploaded(&place), after);
}

#[test]
fn every_inherited_key_can_be_left_out() {
    for (line, key, words) in [
        ("license: ", "license", r#""license" must be one of [apache-2.0, mit]"#),
        ("license_name: ", "license_name", "Invalid metadata: license_name is too short"),
        ("language:", "language", r#""language" with value "English" is not valid"#),
        ("base_model: ", "base_model", r#""base_model" with value "some-org/Tiny-0.1B" is not valid"#),
    ] {
        let place = converted(FRONT);
        refuse(&place, &[(line, words)]);
        let said = place.succeed(&format!("upload out --upload-repo {TO}"));
        assert!(said.contains(&format!("left out {key}, which the hub refuses: {words}")), "{said}");
        let after = uploaded(&place);
        assert!(!after.lines().any(|own| own.starts_with(line)), "{after}");
        assert_eq!(after.contains("base_model_relation"), key != "base_model", "{after}");
        assert!(after.contains("library_name: mlx"), "{after}");
    }
    // Where no key is named, nothing of it stays.
    let place = converted(FRONT);
    refuse(&place, &[("license: other", "bad indentation of a mapping entry (2:1)")]);
    let said = place.succeed(&format!("upload out --upload-repo {TO}"));
    assert!(said.contains("left out license, license_name, license_link, language, base_model"), "{said}");
    assert!(uploaded(&place).starts_with("---\nlibrary_name: mlx\n"));
}

/// What is refused for another reason is not sent, and the directory stays as it is.
#[test]
fn what_is_still_refused_is_not_sent() {
    let place = converted(FRONT);
    let before = card(&place);
    let line = format!("upload out --upload-repo {TO}");
    let sent = |place: &Place| {
        let writes = ["/create", "/preupload", "/commit/", "xet-write-token", "/xorb"];
        let requests = place.hub.requests();
        requests.iter().any(|request| writes.iter().any(|part| request.path.contains(part)))
    };
    for words in
        [r#""tags" must be an array"#, r#""pipeline_tag" must be one of [x]"#, "YAML: end of the stream"]
    {
        refuse(&place, &[("library_name: ", words), ("license: other", "\"license\" is none")]);
        place.fail(&line, 2, &["refuses README.md", words, "mend"]);
        assert_eq!(card(&place), before);
        assert!(!sent(&place), "something was sent");
    }
    // Other people's cards are theirs to mend.
    for own in [
        "---\nlicense: other\n---\nMy own words\n",
        "\u{feff}---\r\nlicense: other\r\n---\r\n",
        "license: other\n",
    ] {
        std::fs::write(place.at("out/README.md"), own).unwrap();
        refuse(&place, &[("license: other", r#""license" must be one of [mit]"#), ("\u{feff}---", "no")]);
        place.fail(&line, 2, &["refuses README.md", "mend"]);
        assert_eq!(card(&place), own);
    }
    std::fs::write(place.at("out/README.md"), b"---\nlicense: \xff\n---\n").unwrap();
    place.fail(&line, 2, &["README.md is no text in UTF-8"]);
    assert!(!sent(&place), "something was sent");
    assert!(!place.hub.requests().iter().any(|request| request.path.contains("/repos/create")));
}

/// After a conversion the work is done: another code, and where it is.
#[test]
fn what_a_command_made_stays() {
    let place = Place::with_model();
    place.hub.offer_xet(true);
    refuse(&place, &[("library_name: ", r#""library_name" is none"#)]);
    let line = format!("convert -q --model {ID} --mlx-path out --upload-repo {TO}");
    place.fail(
        &line,
        1,
        &["out was written, but not uploaded", "refuses README.md", r#""library_name" is none"#],
    );
    place.succeed("inspect out --verify");
    assert!(!place.hub.requests().iter().any(|request| request.path.contains("/repos/create")));
    // The same command by itself refuses.
    place.fail(&format!("upload out --upload-repo {TO}"), 2, &["refuses README.md"]);
    // And what is inherited goes before it is measured and sent.
    let place = converted(FRONT);
    refuse(&place, &[("license: other", r#""license" must be one of [mit]"#)]);
    let said = place.succeed(&format!("convert -q --model {ID} --mlx-path again --upload-repo {TO}"));
    assert!(said.contains("left out license,"), "{said}");
    let card = uploaded(&place);
    assert!(!card.contains("license: other") && card.contains("KL(source, this)"), "{card}");
    assert_eq!(std::fs::read_to_string(place.at("again/README.md")).unwrap(), card);
}

#[test]
fn warnings_are_said_and_a_hub_that_does_not_judge_is_no_obstacle() {
    let place = converted(FRONT);
    place.hub.judge_cards(|_| Verdict { errors: Vec::new(), warnings: vec!["no eval results".to_owned()] });
    let said = place.succeed(&format!("upload out --upload-repo {TO}"));
    assert_eq!(said.matches("README.md: no eval results").count(), 1, "{said}");
    for code in [404, 405, 501] {
        let place = converted(FRONT);
        let fault = Fault::Status { code, retry_after: None, body: "no".to_owned() };
        place.hub.fault("/validate-yaml", 10, fault);
        place.succeed(&format!("upload out --upload-repo {TO}"));
    }
    // No card, nothing to judge.
    let place = converted(FRONT);
    std::fs::remove_file(place.at("out/README.md")).unwrap();
    place.succeed(&format!("upload out --upload-repo {TO}"));
    assert!(!place.hub.requests().iter().any(|request| request.path.contains("validate-yaml")));
}

#[test]
fn odd_answers_on_cards() {
    let place = converted(FRONT);
    let line = format!("upload out --upload-repo {TO}");
    let status = |code: u16, body: &str| Fault::Status { code, retry_after: None, body: body.to_owned() };
    for (fault, code, words) in [
        (status(400, r#"{"error": "Too long"}"#), 2, "Too long"),
        (status(400, "<html>"), 2, "refuses README.md"),
        (status(200, r#"{"errors": [{"message": "\"tags\" \u001b[31m are none"}]}"#), 2, "are none"),
        (status(503, ""), 1, "answered 503"),
        (status(401, ""), 2, "does not accept the token"),
        (Fault::Html, 1, "did not answer as the hub does"),
    ] {
        place.hub.calm();
        place.hub.fault("/validate-yaml", 100, fault);
        let output = finish(&mut place.command(&line));
        failed(&line, &output, code, &[words]);
        assert!(!output.stderr.contains(&0x1b), "the terminal was spoken to");
    }
    place.hub.calm();
    place.hub.fault("/validate-yaml", 2, status(500, ""));
    place.succeed(&line);
}

/// The licence of the source stays, whatever editor wrote it, and the card is YAML whatever stands there.
#[test]
fn front_matter_of_any_form_keeps_its_licence() {
    let plain = "---\nlicense: apache-2.0\nlanguage:\n- de\ntags: [x]\n---\nText\n";
    for front in [
        plain.to_owned(),
        plain.replace('\n', "\r\n"),
        format!("\u{feff}{}", plain.replace('\n', "\r\n")),
        plain.replace("---\n", "---   \n"),
        plain.replace("license: apache-2.0\n", "license: mit\nlicense: apache-2.0 # ours\n"),
        plain.replace("- de\n", "\t- de\n"),
    ] {
        let place = converted(&front);
        let card = card(&place);
        assert!(
            card.starts_with("---\nlicense: apache-2.0\nlanguage:\n- de\nlibrary_name: mlx\n"),
            "{front:?}\n{card}"
        );
        assert!(!card.contains('\r'), "{card:?}");
    }
    for front in ["---\nlicense: apache-2.0\n", "license: apache-2.0\n", "---\nlicense: *x\n---\n"] {
        let card = card(&converted(front));
        assert!(card.starts_with("---\nlanguage: en\nlibrary_name: mlx\n"), "{front:?}\n{card}");
    }
}
