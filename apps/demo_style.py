"""The style sheets of the demo's page, and of a conversation saved as a page of its own."""

CSS = """
:root { --mm-ink: #1c2330; --mm-soft: #5b6577; --mm-line: #dfe3ea; --mm-card: #ffffff; --mm-page: #f5f6f9; --mm-accent: #4f46e5;
        --mm-good: #1d7a4c; --mm-warn: #9a5b00; --mm-bad: #b3261e; --mm-bad-bg: #fdecea; --mm-bubble: #e6e8ff; }
.dark { --mm-ink: #e8ebf2; --mm-soft: #a3adbf; --mm-line: #343b49; --mm-card: #1d222c; --mm-page: #14171d; --mm-accent: #a5b4fc;
        --mm-good: #6fd3a0; --mm-warn: #f0b860; --mm-bad: #ff9d94; --mm-bad-bg: #3b1f1d; --mm-bubble: #2d2f55; }
#mm-head h1 { font-size: 26px; font-weight: 680; letter-spacing: -0.02em; margin: 0; color: var(--mm-ink); }
#mm-head p { margin: 4px 0 0; color: var(--mm-soft); font-size: 15px; line-height: 1.5; }
.mm-models { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 8px; margin-top: 12px; }
.mm-model { border: 1px solid var(--mm-line); background: var(--mm-card); border-radius: 10px; padding: 7px 12px; font-size: 13px;
        color: var(--mm-soft); max-width: 100%; overflow-wrap: anywhere; }
.mm-model b { color: var(--mm-ink); font-size: 14px; margin-right: 6px; }
.mm-rounds { display: flex; flex-direction: column; gap: 22px; color: var(--mm-ink); }
.mm-empty { border: 1.5px dashed var(--mm-line); border-radius: 14px; padding: 42px 20px; text-align: center; color: var(--mm-soft);
        font-size: 15px; line-height: 1.6; }
.mm-empty b { color: var(--mm-ink); display: block; font-size: 17px; margin-bottom: 4px; }
.mm-ask { display: flex; justify-content: flex-end; align-items: flex-end; gap: 10px; margin-bottom: 10px; }
.mm-ask p { background: var(--mm-bubble); border-radius: 14px 14px 4px 14px; padding: 10px 14px; margin: 0; font-size: 15.5px; line-height: 1.45;
        max-width: 75%; overflow-wrap: anywhere; white-space: pre-wrap; }
.mm-ask img { width: 112px; height: 112px; object-fit: cover; border-radius: 12px; border: 1px solid var(--mm-line); margin: 0; }
.mm-answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 12px; }
.mm-answer { background: var(--mm-card); border: 1px solid var(--mm-line); border-radius: 14px; padding: 13px 15px 11px; min-height: 112px;
        display: flex; flex-direction: column; gap: 8px; min-width: 0; box-shadow: 0 1px 2px rgb(20 30 60 / 5%); }
.mm-answer.mm-failed { border-color: var(--mm-bad); background: var(--mm-bad-bg); }
.mm-answer header { display: flex; justify-content: space-between; align-items: baseline; gap: 8px; font-size: 13px; }
.mm-answer header b { font-size: 14px; overflow-wrap: anywhere; }
.mm-answer .mm-text { flex: 1; margin: 0; font-size: 17px; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; }
.mm-answer .mm-none { color: var(--mm-soft); font-size: 15px; }
.mm-answer footer { color: var(--mm-soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.mm-state { white-space: nowrap; color: var(--mm-soft); }
.mm-writing .mm-state { color: var(--mm-accent); } .mm-done .mm-state { color: var(--mm-good); }
.mm-stopped .mm-state { color: var(--mm-warn); } .mm-failed .mm-state { color: var(--mm-bad); }
.mm-writing .mm-text::after { content: ""; display: inline-block; width: 8px; height: 1.05em; margin-left: 3px; vertical-align: text-bottom;
        background: var(--mm-accent); border-radius: 2px; animation: mm-blink 1s steps(2) infinite; }
@keyframes mm-blink { to { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .mm-writing .mm-text::after { animation: none; } }
.mm-notice { border: 1px solid var(--mm-bad); background: var(--mm-bad-bg); color: var(--mm-ink); border-radius: 12px; padding: 11px 14px;
        font-size: 14.5px; line-height: 1.45; overflow-wrap: anywhere; }
.mm-notice b { color: var(--mm-bad); }
#mm-presets { gap: 8px !important; flex-wrap: wrap !important; }
#mm-presets button { flex: 0 1 auto !important; min-width: 0 !important; width: auto !important; border-radius: 999px !important; font-weight: 450;
        padding: 5px 13px !important; font-size: 13.5px !important; }
#mm-send, #mm-vote-send { align-items: stretch !important; flex-wrap: nowrap !important; }
#mm-send > button, #mm-vote-send > button { flex: 0 0 auto !important; min-width: 84px !important; }
#mm-send .form, #mm-send .block, #mm-vote-send .form, #mm-vote-send .block { min-width: 0 !important; }
#mm-head .html-container, #mm-conversation .html-container, #mm-notice .html-container { padding: 0 !important; }
#mm-examples, #mm-examples .gallery-container, #mm-examples .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
#mm-examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; grid-auto-rows: auto !important; gap: 8px; padding-top: 26px; }
#mm-examples button.thumbnail-item { border-radius: 10px; overflow: hidden; width: 100%; height: auto; aspect-ratio: 1; min-width: 0; }
.mm-model > summary { cursor: pointer; list-style: none; } .mm-model > summary::-webkit-details-marker { display: none; }
.mm-model > summary:focus-visible { outline: 2px solid var(--mm-accent); outline-offset: 4px; border-radius: 6px; }
.mm-model dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; margin: 8px 0 2px; font-size: 12.5px; }
.mm-model dt { color: var(--mm-soft); } .mm-model dd { margin: 0; color: var(--mm-ink); overflow-wrap: anywhere; }
.mm-shown { display: flex; flex-wrap: wrap; gap: 6px; justify-content: flex-end; }
.mm-attempt { display: block; font-size: 12px; color: var(--mm-soft); margin-top: 4px; }
.mm-info { border: 1px solid var(--mm-line); background: var(--mm-card); color: var(--mm-ink); border-radius: 12px; padding: 11px 14px;
        font-size: 14.5px; line-height: 1.5; overflow-wrap: anywhere; }
.mm-table { overflow-x: auto; } .mm-table table { border: 0 !important; border-collapse: collapse; width: 100%; font-size: 14px;
        color: var(--mm-ink); margin: 0; }
.mm-table caption { text-align: left; font-weight: 620; padding: 12px 0 6px; color: var(--mm-ink); }
.mm-table :is(thead, tbody, tr) { border: 0 !important; }
.mm-table th, .mm-table td { text-align: left; padding: 6px 10px; border: 0 !important;
        border-bottom: 1px solid var(--mm-line) !important; vertical-align: top; background: none; }
.mm-table th { color: var(--mm-soft); font-weight: 550; } .mm-table .mm-number { text-align: right; font-variant-numeric: tabular-nums; }
.mm-maps { display: flex; flex-wrap: wrap; gap: 14px; } .mm-maps figure { margin: 0; max-width: 288px; }
.mm-maps img { width: 100%; border-radius: 10px; border: 1px solid var(--mm-line); image-rendering: pixelated; display: block; margin: 0; }
.mm-maps figcaption { font-size: 12.5px; color: var(--mm-soft); line-height: 1.45; margin-top: 5px; overflow-wrap: anywhere; }
.mm-maps figcaption b { color: var(--mm-ink); display: block; font-size: 13.5px; }
.mm-scale { display: inline-block; width: 96px; height: 8px; border-radius: 4px; vertical-align: middle; margin: 0 6px;
        background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725); }
.mm-table + .mm-info, .mm-info + .mm-cards { margin-top: 12px; } .mm-cards { display: grid;
        grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); gap: 12px; color: var(--mm-ink); }
.mm-card { border: 1px solid var(--mm-line); background: var(--mm-card); border-radius: 12px; padding: 12px; display: flex; flex-direction: column; gap: 8px; }
.mm-card img { width: 100%; max-height: 180px; object-fit: contain; border-radius: 8px; margin: 0; background: var(--mm-page); }
.mm-card p { margin: 0; font-size: 14.5px; overflow-wrap: anywhere; } .mm-card small { color: var(--mm-soft); font-size: 12.5px; }
.mm-card ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 3px; font-size: 14px; }
.mm-card li { display: flex; justify-content: space-between; gap: 8px; margin: 0; } .mm-card li b { font-weight: 550; color: var(--mm-soft); }
.mm-right { color: var(--mm-good); } .mm-wrong { color: var(--mm-bad); }
#mm-tabs button[role=tab].selected { color: var(--mm-accent) !important; }
#mm-tools { gap: 8px !important; flex-wrap: wrap !important; } #mm-tools button, #mm-tools label { width: auto !important; flex: 0 0 auto !important;
        min-width: 0 !important; }
#mm-vote-buttons { gap: 8px !important; flex-wrap: wrap !important; } #mm-vote-buttons button { flex: 1 1 110px !important; min-width: 0 !important; }
#mm-votes .html-container, #mm-vote-answers .html-container, #mm-vote-notice .html-container, #mm-maps .html-container,
#mm-answer-maps .html-container, #mm-rows .html-container, #mm-browse-notice .html-container { padding: 0 !important; }
@media (max-width: 700px) {
  #mm-send, #mm-vote-send { flex-wrap: wrap !important; }
  #mm-send > :first-child, #mm-vote-send > :first-child { flex: 1 1 100% !important; }
  #mm-send > button, #mm-vote-send > button { flex: 1 1 0 !important; }
  #mm-head h1 { font-size: 22px; } .mm-ask p { max-width: 100%; } .mm-ask img { width: 84px; height: 84px; }
  .row > .column { min-width: 0 !important; flex: 1 1 100% !important; }
  #mm-examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; gap: 6px; }
  .mm-empty { padding: 22px 14px; }
  #mm-tabs button[role=tab] { padding-left: 9px !important; padding-right: 9px !important; }
}
"""

# gradio confines `CSS` to what stands inside its page's <main>; the frame around that is styled from the document's head.
HEAD = """<style>
.gradio-container { background: #f5f6f9 !important; max-width: 1240px !important; margin: 0 auto !important; }
.dark .gradio-container { background: #14171d !important; }
.gradio-container .main.app { padding: 0 !important; }
.gradio-container main.contain { padding: 32px 28px 28px !important; }
.gradio-container footer:not(.mm-times) { display: none !important; }
@media (max-width: 700px) { .gradio-container main.contain { padding: 16px 14px 22px !important; } }
</style>"""

# A saved conversation stands without gradio around it, and follows the reader's own choice of light or dark.
SHARED_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f9; font-family: ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 20px 48px; display: grid; gap: 24px; }
.mm-ask img { width: auto; max-width: min(320px, 100%); height: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #14171d; }
  :root { --mm-ink: #e8ebf2; --mm-soft: #a3adbf; --mm-line: #343b49; --mm-card: #1d222c; --mm-page: #14171d; --mm-accent: #a5b4fc;
        --mm-good: #6fd3a0; --mm-warn: #f0b860; --mm-bad: #ff9d94; --mm-bad-bg: #3b1f1d; --mm-bubble: #2d2f55; }
}
"""
